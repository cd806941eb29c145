"""What the command line does beside training: the demo, scores, reports, exports."""
