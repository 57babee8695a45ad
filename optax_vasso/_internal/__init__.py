"""Shared by all packages: numerics, checks, and ways to find things in trees."""
