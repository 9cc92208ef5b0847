"""What the networks compute. Nothing here knows of memory policies or of sampling."""
