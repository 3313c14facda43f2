"""From a model to a program of dynamic shapes, under the names that runtimes know."""
