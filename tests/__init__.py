"""Tests; a package so that they can share the brokers and the like."""
