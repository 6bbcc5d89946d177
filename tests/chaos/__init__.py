"""Random failures of workers, brokers and upstreams, and checks of every guarantee."""
