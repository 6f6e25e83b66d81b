"""What two or more segmenters share."""
