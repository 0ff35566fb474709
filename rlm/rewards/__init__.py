"""What a response is worth: its format, its answer, named rewards."""
