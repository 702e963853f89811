"""What the numbers mean; not how they were chosen."""
