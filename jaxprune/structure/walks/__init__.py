"""What flows where in a typed program."""
