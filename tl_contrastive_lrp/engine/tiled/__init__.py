"""The tiled engine: block by block and tile by tile over the model's own key-value cache."""
