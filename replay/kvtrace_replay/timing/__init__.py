"""What a scheduler step costs: work, costs per unit of it, and profiles that hold them."""
