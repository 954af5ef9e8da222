"""gRPC: services, interceptors, status mapping. Protobuf stops here, and nothing here imports torch."""
