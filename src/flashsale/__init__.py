"""The contract of the flash-sale engine: what API, consumer and operator must agree on."""
