"""What the rooms share: numerics, checks, and ways to find things in trees."""
