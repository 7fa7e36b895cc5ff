"""What stands behind the verbs of a recipe: handles, the builder of the graph, routing."""
