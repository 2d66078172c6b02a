"""A traced function as typed equations, and how it runs at other sizes."""
