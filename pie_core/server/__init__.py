"""`pie serve`: sockets, users and their processes. Clients come in here, programs run in the sandbox below."""
