"""The built-in plugins, imported as `pie_plugins`: drivers, model architectures and media front-ends."""
