"""The API: answers buyers, and publishes what it accepted."""
