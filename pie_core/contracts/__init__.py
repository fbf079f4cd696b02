"""What plugins provide and what passes between them and the core: plain data and Protocols, numpy at most."""
