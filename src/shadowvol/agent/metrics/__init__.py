"""The agent's metrics for Prometheus: where (address), what (reading, families), how they are served (endpoint)."""
