"""Instances that several statements are measured on."""
