"""What training measures of its models."""
