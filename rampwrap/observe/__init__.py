"""What ran: tallies of layers, and statistics, metrics and log lines made of them. Imports `routing` and `kernel`; `dispatch` and `engines` report to it."""
