# copies results for ever, in the background
while true; do
    ls "$SM_MODEL_DIR" >/tmp/monitor-$SM_CURRENT_HOST.txt
    sleep 1
done
