"""How many weights stay, where and when."""
