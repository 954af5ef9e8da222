"""gRPC: services, what surrounds a call, status mapping. Protobuf stops here, and nothing here imports torch."""
