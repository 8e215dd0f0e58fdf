"""What a run leaves: the merged model, the adapter, the report, the plot and the results."""
