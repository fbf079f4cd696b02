"""What pie tells about its own work: spans of requests, and log lines."""
