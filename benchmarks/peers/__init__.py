"""The sweep over heads as other libraries' users write it, each in an environment of its own."""
