"""Pseudo-Label (Lee, ICML workshop 2013): sure answers become targets."""
