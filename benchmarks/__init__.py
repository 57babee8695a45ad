"""What the library costs, against the device's limits and against other libraries."""
