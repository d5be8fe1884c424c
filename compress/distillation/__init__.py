"""Distillation: divergences, features, students cut from teachers, answers on disk."""
