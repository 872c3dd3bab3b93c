"""What is joined to what: ids, ports, edges, links."""
