"""The bundled default dataset: 1,797 images of handwritten digits (see README.md beside this file)."""
