"""Measurements that a claim of the README rests on, each a command that writes its figures."""
