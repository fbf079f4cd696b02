"""Engines in processes of their own: what crosses between them and us, how they are watched, ended and restarted."""
