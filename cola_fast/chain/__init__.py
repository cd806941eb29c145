"""The chain: links, the weights that they are folded into, and its folder. All of it works without our trainer."""
