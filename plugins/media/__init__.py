"""One front-end per model family: bytes of an image or sound become the tensors that its encoder reads."""
