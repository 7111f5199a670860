"""Champion MOJO to predictions, over HTTP, gRPC and Kafka."""
