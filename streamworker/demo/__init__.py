"""The demo: broker, upstream, worker and several jobs on one machine, shown in the terminal."""
