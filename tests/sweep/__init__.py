"""Every architecture family of timm and every model type of transformers, through the life of an adapter."""
