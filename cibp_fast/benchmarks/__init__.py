"""`cibp-fast bench`: whole training steps and single layers, each against its rivals."""
