"""The whole thing on one machine: broker, upstream, worker, several jobs side by side in the terminal."""
