"""The daemon on each host: supervises members, runs the engines, answers the command line."""
