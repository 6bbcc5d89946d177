"""Brokers that the tests run against."""
