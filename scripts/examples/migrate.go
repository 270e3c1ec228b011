// migrate VM QMP HOST:PORT: moves a guest by pagecopyd's API, as an orchestrator would, with Go's own library.
//
//	go run migrate.go web1 /run/web1.qmp host-b:7070
//
// PAGECOPY_API is the API's socket. Ends as `pagecopy migrate` does: 0 moved, 1 failed, 3 cancelled, 4 in doubt.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// A Problem is an error of the API, as RFC 9457 has it.
type Problem struct {
	Type   string `json:"type"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy"`
}

func (problem *Problem) Error() string {
	return fmt.Sprintf("refused: %s\nwhat to do: %s", problem.Detail, problem.Remedy)
}

// An Event is what is looked at of what happens to a migration.
type Event struct {
	Event    string  `json:"event"`
	AtMs     uint64  `json:"at_ms"`
	State    string  `json:"state"`
	Round    int     `json:"round"`
	Decision string  `json:"decision"`
	Status   string  `json:"status"`
	Error    *string `json:"error"`
}

var exits = map[string]int{"completed": 0, "cancelled": 3, "in-doubt": 4}

// A Client speaks HTTP over the API's unix socket.
type Client struct{ http.Client }

func newClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "unix", socket)
	}
	return &Client{http.Client{Transport: &http.Transport{DialContext: dial}}}
}

func (client *Client) ask(method, path, key string, body []byte) (*http.Response, error) {
	request, err := http.NewRequest(method, "http://localhost"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	answer, err := client.Do(request)
	if err != nil || answer.StatusCode < 400 {
		return answer, err
	}
	defer answer.Body.Close()
	problem := new(Problem)
	if err := json.NewDecoder(answer.Body).Decode(problem); err != nil {
		return nil, err
	}
	return nil, problem
}

// begin begins a migration once, however often the request must be sent, and returns its id.
func (client *Client) begin(vm, qmp, to string) (string, error) {
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return "", err
	}
	body, err := json.Marshal(map[string]string{"vm": vm, "qmp": qmp, "to": to})
	if err != nil {
		return "", err
	}
	for pause := time.Second; ; pause *= 2 {
		answer, err := client.ask("POST", "/v1/migrations", hex.EncodeToString(random), body)
		if _, refused := err.(*Problem); refused || (err != nil && pause > 8*time.Second) {
			return "", err
		}
		if err == nil {
			defer answer.Body.Close()
			var begun struct {
				ID string `json:"id"`
			}
			err := json.NewDecoder(answer.Body).Decode(&begun)
			return begun.ID, err
		}
		time.Sleep(pause)
	}
}

// follow hands every event of a migration to tell, up to `finished`, which it returns. A connection that breaks is made again.
func (client *Client) follow(id string, tell func(Event)) (Event, error) {
	var seen uint64
	for {
		answer, err := client.ask("GET", "/v1/migrations/"+id+"/events", "", nil)
		if problem, refused := err.(*Problem); refused {
			return Event{}, problem
		}
		if err == nil {
			lines := bufio.NewScanner(answer.Body)
			lines.Buffer(nil, 1<<20)
			for lines.Scan() {
				data := strings.TrimPrefix(lines.Text(), "data:")
				var event Event
				// Lines that are no data are no JSON. What has been comes again with each connection, but for progress.
				if json.Unmarshal([]byte(data), &event) != nil || event.AtMs < seen {
					continue
				}
				seen = event.AtMs
				tell(event)
				if event.Event == "finished" {
					answer.Body.Close()
					return event, nil
				}
			}
			answer.Body.Close()
		}
		time.Sleep(time.Second)
	}
}

func run(vm, qmp, to string) (int, error) {
	socket := os.Getenv("PAGECOPY_API")
	if socket == "" {
		socket = "/run/pagecopy/api.sock"
	}
	client := newClient(socket)
	id, err := client.begin(vm, qmp, to)
	if err != nil {
		return 1, err
	}
	fmt.Println("migration", id)
	end, err := client.follow(id, func(event Event) {
		switch event.Event {
		case "state":
			fmt.Println(event.State)
		case "round":
			fmt.Printf("round %d: %s\n", event.Round, event.Decision)
		}
	})
	if err != nil {
		return 1, err
	}
	why := ""
	if end.Error != nil {
		why = *end.Error
	}
	fmt.Printf("%s: %s\n", end.Status, why)
	if exit, known := exits[end.Status]; known {
		return exit, nil
	}
	return 1, nil
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "migrate VM QMP HOST:PORT")
		os.Exit(2)
	}
	exit, err := run(os.Args[1], os.Args[2], os.Args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(exit)
}
