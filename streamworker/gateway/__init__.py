"""The gateway: HTTP, event streams and websockets in front of Kafka."""
