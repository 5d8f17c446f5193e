"""How many weights are kept, in which layers and after which rounds."""
