"""What is wrong with norm layers, and what a file says of its own history."""
