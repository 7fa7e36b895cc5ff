"""Where models run: the Protocols that stages use, and the local backend that implements them."""
