"""The API: answers buyers and publishes the accepted reservations to Kafka."""
