"""Paper A in the order data flows: collect, align, select, combine, recover."""
