"""What an owner and its engine say to each other: requests, exits, hypercall numbers, trace events, the measurement."""
