"""What is asked, of which methods, with which options."""
